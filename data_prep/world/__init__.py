"""The procedural surround world: street scenes with exact depth, seen by any rig. docs/world.md describes it."""
