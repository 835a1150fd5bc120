//! Is this node fit for transship?
