"""A program bound to modules, tensors and a device: layout, tables, Lagrangian, step rules."""
