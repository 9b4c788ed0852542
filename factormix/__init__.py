"""FactorMix."""
