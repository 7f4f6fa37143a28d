"""Convolutional image classifiers: packed data, networks, exact data-parallel training, evaluation and export.

A PyTorch library that is useful alone: it knows no scheduler, no tracking server and no object storage.
Importing the package loads nothing; import the module that you need.
"""
