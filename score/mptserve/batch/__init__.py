"""Batch scoring: reads files of rows, generates with the same engine as online, writes one result file per input file.

files → readers → rows → (service) → pipeline → results, summary.  job.py runs a mini-batch through all of them.
"""
