"""Decoders that rank by attention, and the control that asks whether sinks do any work in them."""
