"""Language models: talk to one, train one on a text."""
