"""SyCL, reproduced: graded synthetic passages, list-wise losses, a bi-encoder, nDCG.

Read in this order: data, prompts, generate, losses, encoder, recipes, train, search, metrics,
evaluate, compare, plots.  `support` holds what a reader of the method can skip;
`experiment` puts the method to the test, and nothing else imports it.
"""
