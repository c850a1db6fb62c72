//! Exit codes, the same for every subcommand.

use std::error::Error as StdError;
use std::process::ExitCode;

use crate::{bench, binaries, client, database, dev, fetch, healthcheck, history, sessions, setup, stack, token};

/// How the program ends. 2, wrong usage, comes from the command line's parser.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Done.
    Ok = 0,
    /// It failed.
    Failed = 1,
    /// A configuration is wrong or missing.
    Config = 3,
    /// Something that is needed is not there.
    Dependency = 4,
    /// A check found problems.
    Problems = 5,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit as u8)
    }
}

impl Exit {
    /// The code of an error: of the first error in its chain that says more than "failed".
    pub fn of(error: &(dyn StdError + 'static)) -> Exit {
        let mut next = Some(error);
        while let Some(error) = next {
            let exit = classify(error);
            if exit != Exit::Failed {
                return exit;
            }
            next = error.source();
        }
        Exit::Failed
    }
}

fn classify(error: &(dyn StdError + 'static)) -> Exit {
    if let Some(error) = error.downcast_ref::<setup::Error>() {
        if error.is_dependency() {
            return Exit::Dependency;
        }
        return if error.is_config() { Exit::Config } else { Exit::Failed };
    }
    if let Some(error) = error.downcast_ref::<stack::Error>() {
        return match error {
            stack::Error::Config(_) | stack::Error::PostgresVersion { .. } => Exit::Config,
            stack::Error::PortTaken(_) => Exit::Dependency,
            _ => Exit::Failed,
        };
    }
    if let Some(error) = error.downcast_ref::<client::Error>() {
        return error.exit();
    }
    if let Some(error) = error.downcast_ref::<history::Error>() {
        return error.exit();
    }
    if let Some(error) = error.downcast_ref::<sessions::Error>() {
        return error.exit();
    }
    if let Some(bench::Error::NotConverged(_)) = error.downcast_ref::<bench::Error>() {
        return Exit::Problems;
    }
    if error.is::<healthcheck::Error>() || error.is::<fetch::Error>() {
        return Exit::Dependency;
    }
    match error.downcast_ref::<binaries::Error>() {
        Some(binaries::Error::Own { .. }) => return Exit::Config,
        Some(_) => return Exit::Dependency,
        None => {}
    }
    if error.is::<token::Error>()
        || error.is::<dev::Error>() && error.source().is_some_and(|source| source.is::<std::io::Error>())
    {
        return Exit::Config;
    }
    if error.is::<database::NoDatabase>()
        || error.is::<millstream_catalog::ConfigError>()
        || error.is::<millstream_catalog::CatalogError>()
    {
        return Exit::Config;
    }
    Exit::Failed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cause_decides() {
        let check = |error: &(dyn StdError + 'static), expected| assert_eq!(Exit::of(error), expected, "{error}");
        let own = || binaries::Error::Own { variable: "X", value: "y".into(), reason: "z".into() };
        check(&own(), Exit::Config);
        check(&dev::Error::Stack(stack::Error::Binaries(own())), Exit::Config);
        check(&dev::Error::Stack(stack::Error::Binaries(binaries::Error::NoCache)), Exit::Dependency);
        check(&healthcheck::Error::Url("x".into()), Exit::Dependency);
        check(&stack::Error::NoPort, Exit::Failed);
    }
}
