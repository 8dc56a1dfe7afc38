"""What everything else stands on: where things are in a model, methods as values, and attaching them."""
