"""What tools/study_transformers.py measures: subjects, scores, rows and what is told of them."""
