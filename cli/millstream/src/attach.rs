//! `millstream attach`: writes the migration that lets concurrent changes to an existing table merge.

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use millstream_catalog::{ClockNames, Config, ConfigError};
use millstream_provision::attach::{self as provision, Policy};
use millstream_provision::exit::{Exit, HasExit};
use millstream_provision::setup;

use crate::database::{DatabaseArgs, NoDatabase};

/// Flags of `millstream attach`.
#[derive(clap::Args, Clone)]
#[command(before_help = "Examples:
  millstream attach                                     all synced tables, the migration on stdout
  millstream attach tasks --output migrations/7_merge_tasks.sql
  millstream attach app.notes --policy row")]
#[command(
    after_help = "The database is only read. Where the application has columns of the names that Millstream would use, others are \
taken and written into millstream.toml (`clocks`). Tables that no client may write are left alone unless they are named. Without DATABASE_URL it is that of `millstream dev` in --data. Nothing on stdout means that there is nothing to do."
)]
pub struct Args {
    /// Tables, as millstream.toml names them; all synced ones if none is named
    #[arg(value_name = "TABLE")]
    pub tables: Vec<String>,
    /// How concurrent changes shall meet; by default what the table declares, else by column
    #[arg(long)]
    pub policy: Option<Policy>,
    /// The synced tables; may be missing if tables are named
    #[arg(long, env = "MILLSTREAM_CONFIG", default_value = "millstream.toml")]
    pub config: PathBuf,
    /// Write the migration to this new file instead of stdout
    #[arg(long)]
    pub output: Option<PathBuf>,
    /// The database.
    #[command(flatten)]
    pub database: DatabaseArgs,
}

/// No migration.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `millstream.toml`.
    #[error("the configuration is not usable")]
    Config(#[source] ConfigError),
    /// Nothing says which database.
    #[error("which database?")]
    NoDatabase(#[source] NoDatabase),
    /// The database cannot be reached.
    #[error("the database")]
    Connect(#[source] setup::Error),
    /// The tables.
    #[error(transparent)]
    Attach(#[from] provision::Error),
    /// The output.
    #[error("cannot write the migration to {path}")]
    Output {
        /// Where.
        path: String,
        /// Why.
        source: io::Error,
    },
}

impl HasExit for Error {
    fn exit(&self) -> Exit {
        match self {
            Error::Config(error) => error.exit(),
            Error::NoDatabase(error) => error.exit(),
            Error::Connect(error) => error.exit(),
            Error::Attach(error) => error.exit(),
            Error::Output { .. } => Exit::Failed,
        }
    }
}

/// Runs `millstream attach`.
pub async fn run(args: Args) -> Result<(), Error> {
    let config = match Config::read(&args.config) {
        Ok(config) => Some(config),
        Err(ConfigError::Read { source, .. })
            if source.kind() == io::ErrorKind::NotFound && !args.tables.is_empty() =>
        {
            None
        }
        Err(error) => return Err(Error::Config(error)),
    };
    let mut connection = setup::connect(&args.database.find().map_err(Error::NoDatabase)?, Duration::ZERO)
        .await
        .map_err(Error::Connect)?;
    let outcome = provision::attach(&mut connection, config.as_ref(), &args.tables, args.policy).await?;
    for note in &outcome.notes {
        eprintln!("{note}");
    }
    if let Some(sql) = outcome.sql {
        match args.output {
            Some(path) => {
                let written = fs::File::create_new(&path).and_then(|mut file| file.write_all(sql.as_bytes()));
                written.map_err(|source| Error::Output { path: path.display().to_string(), source })?;
                eprintln!("wrote {}: apply it as the tables' owner", path.display());
            }
            None => io::stdout()
                .lock()
                .write_all(sql.as_bytes())
                .map_err(|source| Error::Output { path: "stdout".into(), source })?,
        }
    }
    for (table, names) in &outcome.renamed {
        name_in_file(&args.config, table, names)?;
    }
    if outcome.refused.is_empty() { Ok(()) } else { Err(provision::Error::Refused(outcome.refused).into()) }
}

/// The line of `millstream.toml` that gives a table's clocks their names.
fn clocks_line(names: &ClockNames) -> String {
    let defaults = ClockNames::default();
    let all = [
        ("field_clocks", &names.field_clocks, &defaults.field_clocks),
        ("updated_at", &names.updated_at, &defaults.updated_at),
        ("client_id", &names.client_id, &defaults.client_id),
    ];
    let named = all.iter().filter(|(_, name, default)| name != default);
    let pairs: Vec<String> = named.map(|(key, name, _)| format!("{key} = {name:?}")).collect();
    format!("clocks = {{ {} }}", pairs.join(", "))
}

/// `text`, a `millstream.toml`, with the line below the header of the table's section; `None` where it cannot be put there.
fn with_clocks(text: &str, table: &str, line: &str) -> Option<String> {
    let is_header = |found: &str| {
        let inner = found.split('#').next().unwrap_or_default().trim().strip_prefix("[tables.")?.strip_suffix(']')?;
        Some(inner.trim().trim_matches(['"', '\'']) == table)
    };
    let at = text.split_inclusive('\n').scan(0, |end, found| {
        *end += found.len();
        Some((*end, found))
    });
    let (end, header) = at.into_iter().find(|(_, found)| is_header(found) == Some(true))?;
    let separator = if header.ends_with('\n') { "" } else { "\n" };
    let changed = format!("{}{separator}{line}\n{}", &text[..end], &text[end..]);
    // Such as where the table has `clocks` already.
    Config::parse(&changed, Path::new("")).is_ok().then_some(changed)
}

/// Writes the names into the file, or says what to write.
fn name_in_file(config: &Path, table: &str, names: &ClockNames) -> Result<(), Error> {
    let line = clocks_line(names);
    let changed = fs::read_to_string(config).ok().and_then(|text| with_clocks(&text, table, &line));
    match changed {
        Some(text) => {
            fs::write(config, text).map_err(|source| Error::Output { path: config.display().to_string(), source })?;
            eprintln!("{table}: wrote into {}: {line}", config.display());
        }
        None => eprintln!("{table}: write below [tables.{table}] in {}: {line}", config.display()),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_put_below_the_tables_header() {
        let names = ClockNames { updated_at: "a \"b".into(), ..ClockNames::default() };
        let line = clocks_line(&names);
        let scope = "scope = { kind = \"global\" }\n";
        for header in ["[tables.tasks]", "[tables.tasks]  # why", "[tables.\"tasks\"]"] {
            let text = format!("[tables.tasks_old]\n{scope}\n{header}\n{scope}");
            let changed = with_clocks(&text, "tasks", &line).expect(header);
            assert_eq!(changed, format!("[tables.tasks_old]\n{scope}\n{header}\n{line}\n{scope}"));
            let config = Config::parse(&changed, Path::new("")).unwrap();
            assert_eq!(config.tables["tasks"].clocks, names);
            assert_eq!(with_clocks(&changed, "tasks", &line), None, "once");
        }
        assert_eq!(with_clocks("[tables]\ntasks = { scope = { kind = \"global\" } }\n", "tasks", &line), None);
    }
}
