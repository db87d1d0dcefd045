"""A run from its check to its end: label and retry, what stops them and what they tell meanwhile.

May import all rooms of the core. Read pipeline.py first: it is the whole flow.
"""
