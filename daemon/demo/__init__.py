"""`foldd demo`: the main job on real data, start to end, with the commands that a user would type.

`build` (its own process, with torch) trains a small base and six tasks; `journey` (without torch) hands them to the
real daemon one by one and asks the real runtime after every generation.
"""
