"""Turn documents into rows of tokens, in an order that a resumed run continues exactly."""
