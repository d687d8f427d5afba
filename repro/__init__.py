"""SyCL, reproduced: graded synthetic passages, list-wise losses, a bi-encoder, nDCG.

Read the modules in the order in which the data flows: files, checkpoints -> prompts -> generate -> data ->
losses -> start -> encoder -> train -> metrics -> evaluate -> plots; `experiment` puts them to the test.
"""
