//! The migration: codec, protocol, source, destination, report.
