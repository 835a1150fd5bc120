//! The unix socket between agent and shim.
