"""What causes the behaviour? Counterfactual runs and what they did to a metric."""
