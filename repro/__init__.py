"""SyCL, reproduced: graded synthetic passages, list-wise losses, a bi-encoder, nDCG.

Read the modules in the order in which the data flows:
checkpoints -> prompts -> generate -> data -> losses -> encoder -> train -> metrics -> evaluate -> plots.
"""
