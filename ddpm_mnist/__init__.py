"""The full-precision teacher, and one seeded sampler for every denoiser."""
