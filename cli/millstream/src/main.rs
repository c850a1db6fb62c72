//! The command `millstream`: the services, dev mode, and what developers and operators need. Flags and printing are here;
//! what the subcommands do is in the crates beside this one.

mod attach;
mod check;
mod client;
mod command;
mod database;
mod dev;
mod healthcheck;
mod history;
mod keys;
mod output;
mod sessions;
mod setup;
mod token;

fn main() -> std::process::ExitCode {
    command::main()
}
