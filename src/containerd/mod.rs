//! What we ask of containerd over gRPC.
