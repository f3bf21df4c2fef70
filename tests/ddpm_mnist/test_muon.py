import pytest
import torch

from ddpm_mnist.muon import Muon, orthogonalise


@pytest.mark.parametrize("shape", [(24, 24), (16, 144), (144, 16)])
def test_singular_values_are_brought_close_to_one(shape):
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 7
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    ours = orthogonalise(matrix)
    values = torch.linalg.svdvals(ours)
    assert 0.3 < values.min() <= values.max() < 1.3
    assert torch.nn.functional.cosine_similarity(ours.flatten(), (u @ v).flatten(), dim=0) > 0.95


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_updates_are_those_of_torch(shape):
    """torch's works in bfloat16: three digits."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(*shape, generator=generator)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    options = {"weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"}
    optimizers = Muon([ours], lr=0.1), torch.optim.Muon([theirs], lr=0.1, **options)
    for _ in range(4):
        gradient = torch.randn(*shape, generator=generator)
        before = ours.detach().clone(), theirs.detach().clone()
        for weight, optimizer in zip((ours, theirs), optimizers, strict=True):
            weight.grad = gradient.clone()
            optimizer.step()
        moved = ours - before[0], theirs - before[1]
        assert (moved[0] - moved[1]).norm() < 0.02 * moved[1].norm()


def test_a_convolution_is_a_matrix_of_its_output_channels():
    generator = torch.Generator().manual_seed(0)
    kernel, gradient = torch.randn(2, 8, 4, 3, 3, generator=generator)
    kernel, matrix = torch.nn.Parameter(kernel.clone()), torch.nn.Parameter(kernel.flatten(1).clone())
    for weight in (kernel, matrix):
        weight.grad = gradient.reshape(weight.shape)
        Muon([weight]).step()
    assert torch.equal(kernel.flatten(1), matrix)
