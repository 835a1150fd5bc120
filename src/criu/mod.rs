//! CRIU's RPC, images and gates.
