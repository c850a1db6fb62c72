//! The command `millstream` as the system tests run it: built by cargo together with them, so never out of date.

fn main() -> std::process::ExitCode {
    millstream::main()
}
