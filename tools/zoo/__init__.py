"""The networks that ``tools/coverage.py`` tries, and what it measures of each."""
