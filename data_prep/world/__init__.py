"""The procedural surround world: street scenes with exact depth, seen by any rig. docs/world.md describes it."""

# Raise it with every change that alters a rendered file's bytes (contents, shading, LiDAR, file formats): a dataset
# that another version began is then refused instead of going on with scenes that do not fit its first ones.
WORLD_VERSION = 1
