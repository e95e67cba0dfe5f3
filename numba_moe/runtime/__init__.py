"""What every op stands on: array bridge, argument checks, compiler, launcher, device functions, simulator."""
