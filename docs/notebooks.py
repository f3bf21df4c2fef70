"""A hook of mkdocs: each notebook becomes a page, with the outputs that are stored in it."""

from pathlib import PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter


class NotebookPage(File):
    """Markdown under the name of its notebook, so that links between pages lead to it."""

    def is_documentation_page(self) -> bool:
        return True


def on_files(files: Files, config: Any) -> Files:
    """Put a page and its pictures in the place of every notebook."""
    for file in list(files):
        if file.src_uri.endswith(".ipynb"):
            folder = PurePosixPath(file.name + "_files")
            names = {"output_files_dir": str(folder), "unique_key": file.name}
            text, resources = MarkdownExporter().from_filename(file.abs_src_path, resources=names)
            files.append(NotebookPage.generated(config, file.src_uri, content=text))
            for name, picture in resources["outputs"].items():
                path = str(PurePosixPath(file.src_uri).parent / name)
                files.append(File.generated(config, path, content=picture))
    return files
