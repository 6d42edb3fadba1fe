"""From documents to rows of tokens, in an order that a resumed run goes on with."""
