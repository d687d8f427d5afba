"""The experiment: what is compared, how it is run and recorded, how claims are judged, the page."""
