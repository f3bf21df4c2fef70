"""One seeded sampler for teacher and students: noise, schedule, solver."""
