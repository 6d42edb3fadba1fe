"""The convex study: full-batch logistic regression, and what beta_t does on a diagonal quadratic."""
