use proptest::prelude::*;

use super::*;

fn fits(rule: &str, argv: &[&str]) -> bool {
    let argv: Vec<Vec<u8>> = argv.iter().map(|arg| arg.as_bytes().to_vec()).collect();
    rule.parse::<Rule>().unwrap().check(&Command { argv: &argv, env: &[], user: None }).is_ok()
}

#[test]
fn a_rule_allows_its_shape() {
    for (rule, argv) in [
        ("ls", &["ls"][..]),
        ("/usr/bin/git clone https://* **", &["/usr/bin/git", "clone", "https://x/y"]),
        ("/usr/bin/git clone https://* **", &["/usr/bin/git", "clone", "https://", "a", "b"]),
        ("cargo test -**", &["cargo", "test", "--", "--nocapture"]),
        ("git log --max-count=*", &["git", "log", "--max-count=3"]),
        ("cat *.rs", &["cat", "a.rs"]),
        ("cat a*b*c", &["cat", "abbc"]),
        ("cat a*a", &["cat", "aa"]),
        (r"echo \*\\", &["echo", r"*\"]),
        ("echo *", &["echo", ""]),
    ] {
        assert!(fits(rule, argv), "{rule}: {argv:?}");
    }
}

#[test]
fn and_nothing_else() {
    for (rule, argv) in [
        ("ls", &["ls", "-l"][..]),
        ("ls", &["/bin/ls"]),
        ("ls", &["./ls"]),
        ("ls", &["lsof"]),
        ("/bin/ls", &["ls"]),
        ("git clone https://* **", &["git", "clone"]),
        ("git clone https://* **", &["git", "clone", "--upload-pack=x", "https://x"]),
        ("git clone https://* **", &["git", "clone", "https://x", "--config=core.sshCommand=x"]),
        ("git clone https://* **", &["git", "clone", "ext::sh https://x"]),
        ("git clone *", &["git", "clone", "-u"]),
        ("cat *.rs", &["cat", "a.rs.sh"]),
        ("cat a*b*c", &["cat", "acb"]),
        ("cat a*a", &["cat", "a"]),
        ("cat a*", &["cat", "b/a"]),
        ("cat a", &["cat", "a", ""]),
        (r"echo \*", &["echo", "x"]),
    ] {
        assert!(!fits(rule, argv), "{rule}: {argv:?}");
    }
}

#[test]
fn meaningless_rules_are_refused() {
    for rule in [
        "",
        "bin/ls",
        "/bin/../ls",
        "/bin//ls",
        "/bin/ls/",
        "..",
        "l*",
        "ls ** a",
        "ls -** a",
        "ls a**",
        r"ls \n",
        r"ls a\",
    ] {
        assert_eq!(rule.parse::<Rule>().unwrap_err().code(), Code::SpecInvalid, "{rule}");
    }
}

#[test]
fn variables_and_users_are_allowed_by_name() {
    let rule: Rule = toml::from_str("program = 'ls'\nenv = ['LANG']\nusers = ['dev']").unwrap();
    let check = |env: &[&str], user: Option<&str>| {
        let env: Vec<Vec<u8>> = env.iter().map(|pair| pair.as_bytes().to_vec()).collect();
        rule.check(&Command { argv: &[b"ls".to_vec()], env: &env, user })
    };
    assert_eq!(check(&["LANG=C"], Some("dev")), Ok(()));
    assert_eq!(check(&["LANG=C"], None), Err(Mismatch::User), "root, if nobody says otherwise");
    for env in ["LD_PRELOAD=/x", "PATH=/x", "LANG_=C", "LANG", "lang=C", "=LANG", ""] {
        assert_eq!(check(&["LANG=C", env], Some("dev")), Err(Mismatch::Environment), "{env}");
    }
    for bad in ["env = ['LD_*']", "env = ['']", "env = ['A=B']", "arg = ['x']"] {
        assert!(toml::from_str::<Rule>(&format!("program = 'ls'\n{bad}")).is_err(), "{bad}");
    }
}

/// The same question answered slowly: every way in which a wildcard could stand for something is tried.
fn slowly(pattern: &[ArgumentPart], arg: &[u8]) -> bool {
    match pattern.split_first() {
        None => arg.is_empty(),
        Some((ArgumentPart::Text(text), rest)) => {
            arg.strip_prefix(text.as_bytes()).is_some_and(|arg| slowly(rest, arg))
        }
        Some((ArgumentPart::Any, rest)) => (0..=arg.len()).any(|at| slowly(rest, &arg[at..])),
    }
}

// `cat /srv/*` allowed `cat /srv/../etc/shadow`.
#[test]
fn a_wildcard_does_not_lead_out_of_its_directory() {
    let rule: Rule = "cat /srv/* --file=/srv/*".parse().unwrap();
    let check = |one: &str, two: &str| {
        let argv: Vec<_> = ["cat", one, two].map(|word| word.as_bytes().to_vec()).into();
        rule.check(&Command { argv: &argv, env: &[], user: None }).is_ok()
    };
    assert!(check("/srv/a/b..c/.x", "--file=/srv/a"));
    for (one, two) in [
        ("/srv/../etc/shadow", "--file=/srv/a"),
        ("/srv/..", "--file=/srv/a"),
        ("/srv/a/../../etc", "--file=/srv/a"),
        ("/srv/./a", "--file=/srv/a"),
        ("/srv/a", "--file=/srv/../etc/shadow"),
        ("/srv/a", "--file=/srv/.."),
    ] {
        assert!(!check(one, two), "{one} {two}");
    }
    let rule: Rule = "cat ../a ./*".parse().unwrap();
    let argv: Vec<_> = ["cat", "../a", "./x"].map(|word| word.as_bytes().to_vec()).into();
    assert!(rule.check(&Command { argv: &argv, env: &[], user: None }).is_err(), "only words without a wildcard");
}

proptest! {
    #[test]
    fn wildcards_match_as_documented(pattern in "[ab*]{0,8}", arg in "[ab-]{0,10}") {
        prop_assume!(!pattern.contains("**"));
        let Arg::Word(pieces) = Arg::try_from(pattern.clone()).unwrap() else { unreachable!() };
        let option = pattern.starts_with('*') && arg.starts_with('-');
        prop_assert_eq!(matches(&pieces, arg.as_bytes()), !option && slowly(&pieces, arg.as_bytes()));
    }

    #[test]
    fn a_rule_without_wildcards_allows_exactly_its_command(
        words in proptest::collection::vec("[ -~é\n]{0,6}", 0..5),
        argv in proptest::collection::vec("[ -~é\n]{0,6}", 0..6),
    ) {
        let args = words.iter().map(|word| Arg::Word(match word.as_str() {
            "" => vec![],
            text => vec![ArgumentPart::Text(text.into())],
        })).collect();
        let rule = Rule { program: Program("ls".into()), args, env: vec![], users: None };
        let allowed = |argv: &[String]| {
            let argv: Vec<Vec<u8>> = std::iter::once("ls").chain(argv.iter().map(String::as_str)).map(|arg| arg.as_bytes().to_vec()).collect();
            rule.check(&Command { argv: &argv, env: &[], user: None }).is_ok()
        };
        prop_assert!(allowed(&words));
        prop_assert_eq!(allowed(&argv), argv == words);
    }

    #[test]
    fn no_option_hides_behind_a_wildcard(args in proptest::collection::vec("[a*]{1,3}|\\*\\*", 0..4), option in "-[a-]{0,3}", at in 0usize..5, filler in "[a]{0,3}") {
        let Ok(rule) = format!("ls {}", args.join(" ")).parse::<Rule>() else { return Ok(()) };
        let mut argv = vec![b"ls".to_vec()];
        argv.extend((0..4).map(|n| if n == at { option.clone() } else { filler.clone() }.into_bytes()));
        if at < 4 {
            let command = Command { argv: &argv, env: &[], user: None };
            prop_assert_eq!(rule.check(&command), Err(Mismatch::Arguments));
        }
    }

    #[test]
    fn a_pattern_is_written_as_it_is_read(text in any::<String>()) {
        if let Ok(arg) = Arg::try_from(text.clone()) {
            prop_assert_eq!(Arg::try_from(arg.to_string()).unwrap(), arg);
        }
        let literal = text.replace('\\', "\\\\").replace('*', "\\*");
        let wanted = if text.is_empty() { vec![] } else { vec![ArgumentPart::Text(text)] };
        prop_assert_eq!(Arg::try_from(literal).unwrap(), Arg::Word(wanted));
    }
}
