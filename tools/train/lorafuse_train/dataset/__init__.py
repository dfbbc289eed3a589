"""The pictures and videos that are trained on: found, checked, decoded, put in order."""
