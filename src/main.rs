//! The binary `transship`: the operator's command line and the node's agent. Everything lives in the library.

fn main() -> std::process::ExitCode {
    transship::private::process();
    transship::private::umask_for_root();
    transship::cli::main()
}
