"""The experiment: what is compared, how it is run and recorded, how the claims are judged, and the tables."""
