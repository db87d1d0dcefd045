"""Reports on outputs and sweeps: one HTML file that a person looks at, and rows and numbers to go on with.

collect, rows   an output, read part by part -> what a report says      page, charts   that -> HTML
review          the rows most worth a person's look                     exports        probabilities for cleanlab
"""
