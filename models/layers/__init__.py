"""Building blocks of the GLM networks."""
