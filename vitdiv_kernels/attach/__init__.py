"""What meets a model as it trains: the objective, the monitor, and the hooks under both."""
