"""Models whose layers have fewer heads or neurons than their architecture says."""
