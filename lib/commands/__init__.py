"""The commands of `sinks`, one module each, thin over the library. Floor 10: stands on the grid."""
