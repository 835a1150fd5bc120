//! A container's network namespace: captured, rebuilt, fenced, announced.
