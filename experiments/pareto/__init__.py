"""Several objectives: fronts, hypervolume, scalarisations and weight rules on problems with known answers."""
