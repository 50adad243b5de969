//! The settings as command-line flags, made from the table.

use std::path::PathBuf;

use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches, value_parser};

use super::settings::{SETTINGS, Setting};
use super::value::Value;

const CONFIG_ARG: &str = "config";

/// What the command line sets: the file to read, and any of the settings.
#[derive(Clone, Debug, Default)]
pub struct Flags {
    pub config: Option<PathBuf>,
    /// By flag.
    given: Vec<(&'static str, Value)>,
}

impl Flags {
    /// The flags that say where a broker's data directory is.
    pub fn locating(config: Option<PathBuf>, data_dir: Option<PathBuf>) -> Self {
        let data_dir = data_dir.map(|path| ("data-dir", Value::One(path.to_string_lossy().into_owned())));
        Self { config, given: data_dir.into_iter().collect() }
    }

    pub(super) fn values(&self) -> impl Iterator<Item = (&'static Setting, &Value)> {
        self.given.iter().filter_map(|(flag, value)| {
            let setting = SETTINGS.iter().find(|setting| setting.flag == *flag)?;
            Some((setting, value))
        })
    }
}

impl Args for Flags {
    fn augment_args(command: Command) -> Command {
        let config = Arg::new(CONFIG_ARG)
            .long(CONFIG_ARG)
            .short('c')
            .value_name("FILE")
            .value_parser(value_parser!(PathBuf))
            .help("TOML file with settings and users [env: LEVERET_CONFIG]");
        let flags = SETTINGS.iter().filter(|setting| setting.on_command_line).map(|setting| {
            let default = setting.default.trim_matches(['(', ')']);
            let env = setting.env();
            Arg::new(setting.flag)
                .long(setting.flag)
                .value_name(setting.value_name)
                .action(ArgAction::Append)
                .help_heading(setting.heading)
                .help(format!("{} [default: {default}] [env: {env}]", setting.help))
        });
        command.arg(config).args(flags)
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for Flags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut flags = Self::default();
        flags.update_from_arg_matches(matches)?;
        Ok(flags)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        self.config = matches.get_one(CONFIG_ARG).cloned().or(self.config.take());
        for setting in SETTINGS.iter().filter(|setting| setting.on_command_line) {
            let Some(given) = matches.get_many::<String>(setting.flag) else {
                continue;
            };
            // `--bind a --bind b` is a list; what takes one value only will say so.
            let given: Vec<_> = given.cloned().collect();
            let value = match <[String; 1]>::try_from(given) {
                Ok([one]) => Value::One(one),
                Err(many) => Value::Many(many),
            };
            self.given.push((setting.flag, value));
        }
        Ok(())
    }
}
