"""The foundation of every op: declaration, array bridge, argument checks, compiler, launcher, cache."""
