//! The command `millstream`: the services, dev mode, and what developers and operators need.

fn main() -> std::process::ExitCode {
    millstream::main()
}
