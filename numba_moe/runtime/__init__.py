"""What every op stands on: declaration, array bridge, argument checks, compiler, launcher, cache."""
