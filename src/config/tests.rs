use std::collections::HashMap;

use clap::{Args, Command, FromArgMatches};

use super::*;
use crate::broker::policy::{ApplyTo, PolicyKind};

fn flags(args: &[&str]) -> Flags {
    let command = Flags::augment_args(Command::new("leveret").no_binary_name(true));
    Flags::from_arg_matches(&command.try_get_matches_from(args).unwrap()).unwrap()
}

/// Loads with these flags, this environment and, if it is not empty, a file of this content.
fn load(args: &[&str], env: &[(&str, &str)], file: &str) -> Result<Config, String> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("leveret.toml");
    let mut flags = flags(args);
    if !file.is_empty() {
        std::fs::write(&path, file).unwrap();
        flags.config = Some(path.clone());
    }
    let env: HashMap<_, _> = env.iter().copied().collect();
    Config::load_with(&flags, |name| env.get(name).map(OsString::from))
        .map_err(|error| error.to_string().replace(&path.display().to_string(), "FILE"))
}

fn refusal(args: &[&str], env: &[(&str, &str)], file: &str) -> String {
    load(args, env, file).map(|config| format!("accepted: {config:?}")).unwrap_err()
}

#[test]
fn flag_beats_environment_beats_file_beats_default() {
    let (flag, env, file) = (["--port", "1"], [("LEVERET_PORT", "2")], "port = 3");
    assert_eq!(load(&flag, &env, file).unwrap().port, 1);
    assert_eq!(load(&[], &env, file).unwrap().port, 2);
    assert_eq!(load(&[], &[], file).unwrap().port, 3);
    assert_eq!(load(&[], &[], "").unwrap().port, 5672);
}

#[test]
fn defaults_are_what_a_rabbitmq_user_expects() {
    let config = load(&[], &[], "").unwrap();
    assert_eq!(config.bind, ["0.0.0.0".parse::<IpAddr>().unwrap()]);
    assert_eq!((config.amqp.heartbeat_secs, config.amqp.channel_max, config.amqp.frame_max_bytes), (60, 2047, 131_072));
    assert_eq!(config.vhosts, ["/"]);
    assert_eq!(config.loopback_users, ["guest"]);
    let [guest] = config.users.as_slice() else { panic!("{:?}", config.users) };
    assert!(guest.name == "guest" && guest.has_tag("administrator"));
    assert!(guest.password.as_ref().unwrap().matches(b"guest"));
    assert_eq!(*guest.permissions["/"], Permission::full());
    assert!(config.node_name.starts_with("leveret@") && config.cluster_name == config.node_name);
}

#[test]
fn the_defaults_in_the_table_are_the_defaults_in_the_code() {
    let expected = format!("{:?}", Draft::default());
    for setting in SETTINGS.iter().filter(|setting| !setting.default.starts_with('(')) {
        let mut draft = Draft::default();
        setting.set(&mut draft, &Value::One(setting.default.to_owned()), Origin::Flag(setting.flag)).unwrap();
        assert_eq!(format!("{draft:?}"), expected, "{}", setting.key);
    }
}

#[test]
fn every_setting_can_be_set_in_every_way_it_claims() {
    for setting in SETTINGS.iter().filter(|setting| !setting.default.starts_with('(')) {
        let (key, value, env) = (setting.key, setting.default, setting.env());
        load(&[], &[(&env, value)], "").unwrap();
        load(&[], &[], &format!("{key} = \"{value}\"")).unwrap();
        if setting.on_command_line {
            load(&[&format!("--{}", setting.flag), value], &[], "").unwrap();
        }
    }
}

#[test]
fn the_documentation_names_every_key_flag_variable_and_default() {
    let page = include_str!("../../docs/configuration.md");
    for setting in SETTINGS {
        let flag = if setting.on_command_line { format!("`--{}`", setting.flag) } else { "none".to_owned() };
        let default = setting.default.trim_matches(['(', ')']);
        let row = format!("| `{}` | {flag} | `{}` |", setting.key, setting.env());
        let line = page.lines().find(|line| line.starts_with(&row));
        assert!(line.is_some_and(|line| line.contains(default)), "{row} with {default}");
    }
}

#[test]
fn the_example_in_the_documentation_is_valid() {
    let page = include_str!("../../docs/configuration.md");
    let mut examples = 0;
    for block in page.split("```toml\n").skip(1) {
        let example = block.split("```").next().unwrap();
        load(&[], &[], example).unwrap();
        examples += 1;
    }
    assert!(examples > 0);
}

#[test]
fn a_refused_value_is_named_with_key_origin_and_what_is_allowed() {
    assert_eq!(
        refusal(&["--port", "70000"], &[], ""),
        "port = '70000' (flag --port): must be a whole number from 0 to 65535"
    );
    assert_eq!(
        refusal(&[], &[("LEVERET_DURABILITY", "maybe")], ""),
        "store.durability = 'maybe' (environment variable LEVERET_DURABILITY): must be one of fsync, os"
    );
    assert_eq!(
        refusal(&[], &[], "[amqp]\nframe_max = 4096"),
        "amqp.frame_max = '4096' (file FILE): must be a size from 8 kiB to 16 MiB, in bytes or with a unit \
         (kiB, MiB, GiB; kB, MB, GB)"
    );
    assert_eq!(
        refusal(&["--bind", "localhost"], &[], ""),
        "bind = 'localhost' (flag --bind): must be a list of IP addresses, such as 127.0.0.1 or ::1"
    );
    assert!(refusal(&["--max-message-size", "1GiB"], &[], "").contains("from 1 byte to 512 MiB"));
    assert!(refusal(&["--frame-max", "0"], &[], "").starts_with("amqp.frame_max = '0'"));
    assert!(refusal(&["--log", "loud"], &[], "").starts_with("log.level = 'loud' (flag --log): must be error, warn"));
    assert!(refusal(&["--port", "1", "--port", "2"], &[], "").starts_with("port = '1, 2' (flag --port)"));
    assert!(
        refusal(&[], &[], "port = { a = 1 }").starts_with("port = '{ a = 1 }' (file FILE): must be a single value")
    );
}

#[test]
fn a_refused_secret_is_not_shown() {
    let text = refusal(&[], &[("LEVERET_DEFAULT_PASSWORD", "top\nsecret")], "");
    assert!(text.starts_with("default_password = '***'"), "{text}");
}

#[test]
fn unknown_keys_are_refused_with_the_nearest_known_one() {
    assert_eq!(refusal(&[], &[], "prot = 1"), "unknown key 'prot' in FILE; did you mean 'port'?");
    assert_eq!(refusal(&[], &[], "heartbeat = 1"), "unknown key 'heartbeat' in FILE; did you mean 'amqp.heartbeat'?");
    assert_eq!(
        refusal(&[], &[], "[store]\ndurabilty = 'os'"),
        "unknown key 'store.durabilty' in FILE; did you mean 'store.durability'?"
    );
    assert_eq!(
        refusal(&[], &[], "[[users]]\nname = 'a'\npasword = 'b'"),
        "unknown key 'users[0].pasword' in FILE; did you mean 'password'?"
    );
    assert!(refusal(&[], &[], "completely_different = 1").contains("known keys are bind, port,"));
    assert!(refusal(&[], &[], "[strange]\nkey = 1").contains("unknown key 'strange'"));
}

#[test]
fn a_file_that_cannot_be_read_or_parsed_says_where() {
    assert_eq!(
        refusal(&["--config", "/nonexistent/leveret.toml"], &[], ""),
        "cannot read configuration file '/nonexistent/leveret.toml': No such file or directory (os error 2)"
    );
    assert!(refusal(&[], &[], "port = 1\nbind = [").starts_with("FILE, line 2, column "));
    let twice = refusal(&[], &[], "port = 1\nport = 2\n");
    assert!(twice.starts_with("FILE, line 2, column 1: ") && !twice.contains('\n'), "{twice}");
}

#[test]
fn the_environment_may_name_the_file_and_the_flag_beats_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("named.toml");
    std::fs::write(&path, "port = 7").unwrap();
    let config = load(&[], &[("LEVERET_CONFIG", path.to_str().unwrap())], "").unwrap();
    assert_eq!((config.port, config.config_file), (7, Some(path.clone())));
    let config = load(&[], &[("LEVERET_CONFIG", path.to_str().unwrap())], "port = 8").unwrap();
    assert_eq!(config.port, 8);
}

#[test]
fn empty_variables_and_service_links_are_ignored() {
    let config = load(&[], &[("LEVERET_PORT", ""), ("LEVERET_CONFIG", "")], "port = 3").unwrap();
    assert_eq!(config.port, 3);
    let config = load(&[], &[("LEVERET_PORT", "tcp://10.96.0.1:5672")], "").unwrap();
    assert_eq!(config.port, 5672);
}

#[test]
fn lists_come_from_repeated_flags_commas_and_arrays() {
    let two = ["127.0.0.1".parse::<IpAddr>().unwrap(), "::1".parse().unwrap()];
    assert_eq!(load(&["--bind", "127.0.0.1", "--bind", "::1"], &[], "").unwrap().bind, two);
    assert_eq!(load(&[], &[("LEVERET_BIND", "127.0.0.1, ::1")], "").unwrap().bind, two);
    assert_eq!(load(&[], &[], "bind = ['127.0.0.1', '::1']").unwrap().bind, two);
    assert!(load(&["--loopback-users", "none"], &[], "").unwrap().loopback_users.is_empty());
    assert!(load(&[], &[], "loopback_users = []").unwrap().loopback_users.is_empty());
    assert!(refusal(&[], &[], "bind = []").contains("at least one IP address"));
    assert!(refusal(&["--vhosts", "a,a"], &[], "").contains("none of them twice"));
}

#[test]
fn frame_limits_must_fit_each_other() {
    assert_eq!(
        refusal(&["--frame-max", "8192", "--initial-frame-max", "16384"], &[], ""),
        "amqp.initial_frame_max = '16384': must not exceed amqp.frame_max (8192)"
    );
}

#[test]
fn the_default_user_can_be_renamed_without_a_file() {
    let env = [("LEVERET_DEFAULT_USER", "ops"), ("LEVERET_DEFAULT_PASSWORD", "secret")];
    let config = load(&["--vhosts", "/,test"], &env, "").unwrap();
    let [ops] = config.users.as_slice() else { panic!("{:?}", config.users) };
    assert!(ops.name == "ops" && ops.password.as_ref().unwrap().matches(b"secret"));
    assert!(ops.permissions.contains_key("/") && ops.permissions.contains_key("test"));
}

#[test]
fn listed_users_replace_the_default_one() {
    let config = load(
        &[],
        &[],
        r#"
        vhosts = ["/", "shop"]
        [[users]]
        name = "app"
        password = "secret"
        tags = ["monitoring"]
        [[users.permissions]]
        vhost = "shop"
        configure = ""
        write = "^orders$"
        read = ".*"
        [[users]]
        name = "imported"
        password_hash = "kI3GCqW5JLMJa4iX1lo7X4D6XbYqlLgxIs30+P6tENUV2POR"
        hash_algorithm = "rabbit_password_hashing_sha256"
    "#,
    )
    .unwrap();
    let [app, imported] = config.users.as_slice() else { panic!("{:?}", config.users) };
    assert!(app.password.as_ref().unwrap().matches(b"secret") && app.has_tag("monitoring"));
    assert!(app.permissions["shop"].write.matches("orders") && !app.permissions["shop"].configure.matches("x"));
    assert!(imported.password.as_ref().unwrap().matches(b"test12") && imported.permissions.is_empty());
    assert!(!format!("{config:?}").contains("secret"));
}

#[test]
fn a_user_that_cannot_be_made_is_named_with_the_reason() {
    let one = |rest: &str| refusal(&[], &[], &format!("[[users]]\nname = 'app'\n{rest}"));
    assert_eq!(one(""), "users[0] = 'app' (file FILE): must have exactly one of password and password_hash");
    assert_eq!(one("password = ''"), "users[0] = 'app' (file FILE): password must not be blank");
    assert_eq!(
        one("password_hash = 'AAAA'"),
        "users[0] = 'app' (file FILE): password_hash: decodes to 3 bytes, but sha256 needs 36 (a salt of 4 and the digest)"
    );
    assert_eq!(
        one("password_hash = 'AAAA'\nhash_algorithm = 'md5'"),
        "users[0] = 'app' (file FILE): hash_algorithm = 'md5' is not a known hash algorithm; use sha256 or sha512"
    );
    let permission = |text: &str| one(&format!("password = 'x'\n[[users.permissions]]\n{text}"));
    assert_eq!(
        permission("configure = '('\nwrite = ''\nread = ''"),
        "users[0] = 'app' (file FILE): configure = '(' in permissions for vhost '/' is not a valid regular expression: unclosed group"
    );
    assert!(permission("configure = ''").contains("missing field `write`"));
    assert!(
        permission("vhost = 'x'\nconfigure = ''\nwrite = ''\nread = ''")
            .contains("(of user 'app') must be one of vhosts (/)")
    );
    assert!(refusal(&[], &[], "[[users]]\npassword = 'x'").contains("missing field `name`"));
    assert!(refusal(&[], &[], "users = 'guest'").contains("must be a list of tables"));
    let twice = "[[users]]\nname = 'a'\npassword = 'x'\n".repeat(2);
    assert!(refusal(&[], &[], &twice).contains("users[1].name = 'a' (file FILE): must not be listed twice"));
}

#[test]
fn a_test_configuration_listens_on_a_free_loopback_port() {
    let config = Config::for_tests("/tmp/data");
    assert!(config.bind == [IpAddr::V4(Ipv4Addr::LOCALHOST)] && config.port == 0);
    assert!(config.users[0].password.as_ref().unwrap().matches(b"guest"));
}

#[test]
fn queues_and_compatibility_have_their_sections() {
    let config = load(&[], &[], "").unwrap();
    assert_eq!(config.queues.default_type, QueueType::Classic);
    assert_eq!(config.queues.consumer_timeout, Some(Duration::from_millis(1_800_000)));
    assert_eq!((config.queues.delivery_limit, config.queues.parking), (Some(20), true));
    assert!(config.compatibility.permit_transient_nonexclusive_queues && config.compatibility.permit_global_qos);
    let file = "[queues]\ndefault_type = 'quorum'\nconsumer_timeout = '500ms'\ndelivery_limit = 'unlimited'\nparking = false\n\
                [compatibility]\npermit_transient_nonexclusive_queues = false\npermit_global_qos = false";
    let config = load(&[], &[], file).unwrap();
    assert_eq!(config.queues.default_type, QueueType::Quorum);
    assert_eq!(config.queues.consumer_timeout, Some(Duration::from_millis(500)));
    assert_eq!((config.queues.delivery_limit, config.queues.parking), (None, false));
    assert!(!config.compatibility.permit_transient_nonexclusive_queues && !config.compatibility.permit_global_qos);
    assert_eq!(load(&["--consumer-timeout", "off"], &[], "").unwrap().queues.consumer_timeout, None);
    assert_eq!(
        refusal(&["--parking", "maybe"], &[], ""),
        "queues.parking = 'maybe' (flag --parking): must be one of true, false"
    );
    assert_eq!(
        refusal(&["--consumer-timeout", "0"], &[], ""),
        "queues.consumer_timeout = '0' (flag --consumer-timeout): must be a time from 1ms to 315360000s, in seconds or \
         with a unit (ms, s, m), or off"
    );
    assert!(refusal(&["--default-queue-type", "stream"], &[], "").contains("must be one of classic, quorum"));
    assert!(refusal(&[], &[("LEVERET_DELIVERY_LIMIT", "-1")], "").contains("from 0 to 4294967295, or unlimited"));
}

#[test]
fn policies_are_read_with_their_defaults() {
    let config = load(
        &[],
        &[],
        r#"
        vhosts = ["/", "shop"]
        [[policies]]
        name = "p"
        pattern = '^(?!amq\.)'
        [policies.definition]
        max-length = 5
        retry = { max = 3, multiplier = 1.5 }
        [[policies]]
        vhost = "shop"
        name = "p"
        pattern = ""
        apply_to = "quorum_queues"
        priority = -1
        definition = { overflow = "reject-publish" }
        [[operator_policies]]
        name = "p"
        pattern = ""
        definition = { expires = 1000 }
    "#,
    )
    .unwrap();
    let [operator, first, second] = config.policies.as_slice() else { panic!("{:?}", config.policies) };
    assert_eq!((first.vhost.as_str(), first.policy.kind), ("/", PolicyKind::User));
    assert_eq!((first.policy.priority, first.policy.apply_to), (0, ApplyTo::All));
    assert_eq!(first.policy.definition.integer("max-length"), Some(5));
    assert_eq!(first.policy.definition.retry().unwrap().max, 3);
    assert_eq!((second.vhost.as_str(), second.policy.priority), ("shop", -1));
    assert_eq!(second.policy.apply_to, ApplyTo::QuorumQueues);
    assert_eq!(operator.policy.kind, PolicyKind::Operator);
}

#[test]
fn a_policy_that_cannot_be_made_is_named_with_the_reason() {
    let one = |rest: &str| refusal(&[], &[], &format!("[[policies]]\nname = 'p'\n{rest}"));
    let whole = |definition: &str| one(&format!("pattern = ''\ndefinition = {definition}"));
    assert_eq!(one("pattern = ''"), "policies[0] = 'p' (file FILE): must have a definition, which is a table");
    assert_eq!(one("definition = { max-length = 1 }"), "policies[0] = 'p' (file FILE): must have a pattern");
    assert_eq!(whole("{ max-length = -1 }"), "policies[0] = 'p' (file FILE): -1 is not a valid maximum length");
    assert_eq!(
        whole("{ max-lenght = 1 }"),
        "policies[0] = 'p' (file FILE): [{<<\"max-lenght\">>,1}] are not recognised policy settings"
    );
    assert_eq!(
        one("pattern = '('\ndefinition = { max-length = 1.5 }"),
        "policies[0] = 'p' (file FILE): 1.5 is not a valid maximum length; \
         pattern should be regular expression but is invalid: unclosed group"
    );
    assert!(one("pattern = ''\napply_to = 'foo'\ndefinition = { max-length = 1 }").contains("'foo' unrecognised"));
    assert!(
        one("pattern = ''\npriority = 'x'\ndefinition = { max-length = 1 }")
            .contains("priority must be a whole number")
    );
    assert_eq!(
        one("pattern = ''\napply-to = 'all'\ndefinition = { max-length = 1 }"),
        "unknown key 'policies[0].apply-to' in FILE; did you mean 'apply_to'?"
    );
    assert_eq!(
        one("vhost = 'shop'\npattern = ''\ndefinition = { max-length = 1 }"),
        "policies.vhost = 'shop': (of policy 'p') must be one of vhosts (/)"
    );
    let twice = "[[operator_policies]]\nname = 'p'\npattern = ''\ndefinition = { max-length = 1 }\n".repeat(2);
    assert_eq!(
        refusal(&[], &[], &twice),
        "operator_policies[1].name = 'p' (file FILE): must not be listed twice for virtual host '/'"
    );
    let operator = "[[operator_policies]]\nname = 'p'\npattern = ''\ndefinition = { dead-letter-exchange = 'x' }";
    assert!(refusal(&[], &[], operator).contains("are not recognised policy settings"));
    assert!(refusal(&[], &[], "policies = 5").contains("must be a list of tables, each under [[policies]]"));
    assert!(refusal(&[], &[], "policy = 5").contains("did you mean 'policies'?"));
    assert!(refusal(&[], &[], "[[policies]]\npattern = ''").contains("policies[0] = 'without a name'"));
}
