"""What answers are worth: metrics over rows with gold answers, their intervals, and comparisons of two sets of answers.

Pure functions of arrays and Arrow tables. scikit-learn is imported inside functions only. Knows nothing of Ray, models
or files.
"""
