"""Plots of the report: plain numbers in, one SVG text out. Only `figure` touches matplotlib."""
