"""The attachment points: how a method is plugged into a model.  A method's own file says only what is
computed."""
