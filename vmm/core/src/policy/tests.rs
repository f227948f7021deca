use nido_api::FrontEnd;
use std::os::unix::fs::PermissionsExt as _;

use proptest::prelude::*;

use super::*;

const EXAMPLE: &str = "
    confirm = 'never'
    read_only = true
    roots = ['/srv/x']

    [[allow]]
    program = '/usr/bin/git'
    args = ['clone', 'https://*', '**']
    env = ['LANG']

    [template.scratch]
    unrestricted = true

    [vm.locked]
    allow = []

    [[vm.build.allow]]
    program = 'make'
    users = ['dev']
";

fn verdict(policy: &Policy, vm: &str, template: &str, argv: &[&str]) -> Verdict {
    let argv: Vec<Vec<u8>> = argv.iter().map(|arg| arg.as_bytes().to_vec()).collect();
    let command = Command { argv: &argv, env: &[], user: Some("dev") };
    decide(policy, &vm.parse().unwrap(), &template.parse().unwrap(), &command)
}

#[test]
fn the_most_specific_list_counts_alone() {
    let policy = Policy::parse(EXAMPLE).unwrap();
    let git = ["/usr/bin/git", "clone", "https://x"];
    let allowed = |vm, template, argv: &[&str]| verdict(&policy, vm, template, argv) == Verdict::Allowed;
    assert!(allowed("web", "sandbox", &git) && !allowed("web", "sandbox", &["make"]));
    assert!(allowed("build", "sandbox", &["make"]) && !allowed("build", "sandbox", &git));
    assert!(allowed("build", "scratch", &["make"]) && !allowed("build", "scratch", &git));
    assert!(allowed("web", "scratch", &["anything"]) && allowed("web", "scratch", &[]));
    assert!(!allowed("locked", "scratch", &["make"]), "an empty list allows nothing");
    let shell = |vm: &str, template: &str| {
        decide_shell(&policy, &vm.parse().unwrap(), &template.parse().unwrap()) == Verdict::Allowed
    };
    assert_eq!((shell("web", "sandbox"), shell("web", "scratch")), (false, true));
    assert_eq!((policy.confirm, policy.read_only), (Confirm::Never, true));
}

// `roots = []` meant the server's defaults: no policy could forbid files of the host.
#[test]
fn an_empty_list_of_roots_is_not_an_absent_one() {
    let roots = |text: &str| {
        let policy = Policy::parse(text).unwrap();
        let count = |roots: Option<&[PathBuf]>| roots.map(<[PathBuf]>::len);
        (count(policy.readable_roots()), count(policy.writable_roots()))
    };
    assert_eq!(roots(""), (None, None));
    assert_eq!(roots("roots = []"), (Some(0), Some(0)));
    assert_eq!(roots("roots = ['/a', '/b']"), (Some(2), Some(2)));
    assert_eq!(roots("roots = ['/a', '/b']\nwrite_roots = []"), (Some(2), Some(0)));
    assert_eq!(roots("read_roots = ['/a']"), (Some(1), None));
}

#[test]
fn with_a_command_list_uploads_need_permission() {
    let text = |upload: &str| {
        format!(
            "{upload}\nallow = [{{ program = 'git' }}]\n[vm.open]\nunrestricted = true\n\
        [vm.locked]\nallow = []\n[template.work]\nallow = []\nupload = true\n"
        )
    };
    let decide = |upload: &str, vm: &str, template: &str| {
        let policy = Policy::parse(&text(upload)).unwrap();
        decide_upload(&policy, &vm.parse().unwrap(), &template.parse().unwrap()) == Verdict::Allowed
    };
    assert_eq!([decide("", "web", "sandbox"), decide("upload = true", "web", "sandbox")], [false, true]);
    // A rule of one list does not apply to another.
    for upload in ["", "upload = true"] {
        let told = [("open", "sandbox"), ("locked", "work"), ("web", "work")].map(|(vm, of)| decide(upload, vm, of));
        assert_eq!(told, [true, false, true]);
    }
    assert_eq!(decide_upload(&Policy::default(), &"a".parse().unwrap(), &"b".parse().unwrap()), Verdict::Allowed);
}

#[test]
fn without_a_list_everything_is_allowed_and_with_one_little_is() {
    let mut policy = Policy::default();
    let said = (&policy.confirm, policy.read_only, policy.readable_roots());
    assert_eq!(said, (&Confirm::Always, false, None));
    assert_eq!(verdict(&policy, "web", "sandbox", &["sh", "-c", "x"]), Verdict::Allowed);
    policy.allow("ls /srv/*".parse().unwrap());
    let why = |argv: &[&str]| match verdict(&policy, "web", "sandbox", argv) {
        Verdict::Denied(denial) => denial,
        Verdict::Allowed => panic!("{argv:?} is allowed"),
    };
    assert_eq!(why(&["sh\x1b", "-c", "ls"]).reason, "not_in_allowlist");
    assert!(why(&["sh\x1b", "-c", "ls"]).detail.starts_with("'sh\\u{1b}' is not in the list"));
    assert!(why(&["ls", "/etc"]).detail.contains("not with these arguments"));
    assert!(why(&[]).detail.contains("login shell"));
    assert_eq!(Error::from(why(&["x"])).code(), Code::Denied);
}

#[test]
fn policy_errors_name_the_line() {
    for (text, words) in [
        (
            "confrim = 'never'",
            &[
                "line 1",
                "`confrim`",
                "`confirm`, `deny_dangerous`, `read_only`, `roots`, `read_roots`, `write_roots`, `limits`, `allow`, `upload`, `template`, `vm`",
            ][..],
        ),
        ("\n[vm.web]\nallows = []", &["line 3", "`allows`", "`unrestricted`, `allow`, `upload`"]),
        ("[[allow]]\nprogram = 'ls'\nargv = []", &["line 3", "`argv`", "`program`, `args`, `env`, `users`"]),
        ("[[allow]]\nargs = []", &["program"]),
        ("[[allow]]\nprogram = 'b*'", &["line 2", "without wildcards"]),
        ("[[allow]]\nprogram = 'ls'\nargs = ['**', 'a']", &["** and -** must be last"]),
        ("[vm.Web]", &["'Web'"]),
        ("[vm.web]\nallow = []\nunrestricted = true", &["[vm.web]", "both"]),
        ("upload = true", &["'upload' requires a list"]),
        ("[vm.web]\nupload = true", &["[vm.web]", "no list"]),
        ("[template.x]\nupload = true\nunrestricted = true", &["[template.x]", "no list"]),
        ("roots = ['srv']", &["'srv'", "absolute"]),
        ("read_roots = ['/a', 'srv']", &["'srv'", "absolute"]),
        ("write_roots = ['']", &["''", "absolute"]),
        ("[limits]\nmax_vm = 3", &["line 2", "`max_vm`", "`max_vms`"]),
        ("[limits]\nnet = ['wifi']", &["line 2", "`none`"]),
        ("confirm = 'yes'", &["line 1", "`always`, `never`"]),
        ("confirm = ['vm_exec@mine']", &["line 1", "`foreign`"]),
        ("confirm =", &["line 1"]),
    ] {
        let error = Policy::parse(text).unwrap_err();
        assert_eq!(error.code(), Code::SpecInvalid);
        for word in words {
            assert!(error.message().contains(word), "{text}: {error}");
        }
        assert!(!error.message().contains('\n'));
    }
}

#[test]
fn a_policy_writable_by_others_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("policy.toml");
    assert_eq!(Policy::load(&path).unwrap_err().code(), Code::PathNotFound);
    std::fs::write(&path, EXAMPLE).unwrap();
    let mode = |mode| std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
    mode(0o664);
    assert_eq!(Policy::load(&path).unwrap_err().code(), Code::Denied);
    mode(0o644);
    assert_eq!(Policy::load(&path).unwrap(), Policy::parse(EXAMPLE).unwrap());
    std::fs::write(&path, "x = 1").unwrap();
    let error = Policy::load(&path).unwrap_err();
    assert!(error.message().contains("policy.toml") && error.hint_for(FrontEnd::Cli).is_some(), "{error}");
}

fn rules() -> impl Strategy<Value = Option<Vec<Rule>>> {
    let arg = any::<String>().prop_filter_map("a pattern", |text| match Arg::try_from(text) {
        Ok(word @ Arg::Word(_)) => Some(word),
        _ => None,
    });
    let args = (
        proptest::collection::vec(arg, 0..3),
        prop_oneof![Just(None), Just(Some(Arg::Rest)), Just(Some(Arg::RestWithOptions))],
    );
    let rule = (
        "/?[a-zé ]{1,8}",
        args,
        proptest::collection::vec("[A-Z_]{1,4}", 0..3),
        proptest::option::of(proptest::collection::vec(any::<String>(), 0..2)),
    );
    let rule = rule.prop_map(|(program, (args, rest), env, users)| Rule {
        program: program.try_into().unwrap(),
        args: args.into_iter().chain(rest).collect(),
        env: env.into_iter().map(|name| name.try_into().unwrap()).collect(),
        users,
    });
    proptest::option::of(proptest::collection::vec(rule, 0..3))
}

proptest! {
    #[test]
    fn a_policy_comes_back_as_it_was_written(
        allow in rules(), vm in rules(), unrestricted in any::<bool>(), read_only in any::<bool>(),
        never in any::<bool>(), upload in any::<bool>(), root in "/[a-zé \"'\\\\]{0,8}",
    ) {
        let unrestricted = unrestricted && vm.is_none();
        let section = Section { unrestricted, upload: upload && vm.is_some(), allow: vm };
        let policy = Policy {
            confirm: if never { Confirm::Never } else { "vm_exec@foreign,vm_spawn".parse().unwrap() },
            deny_dangerous: upload.then_some(false),
            read_only,
            roots: Some(vec![root.into()]),
            read_roots: None,
            write_roots: upload.then(Vec::new),
            limits: Limits { max_vms: upload.then_some(3), publish: never.then(Vec::new), ..Limits::default() },
            upload: upload && allow.is_some(),
            allow,
            template: BTreeMap::from([("sandbox".parse().unwrap(), section.clone())]),
            vm: BTreeMap::from([("web-1".parse().unwrap(), section)]),
        };
        prop_assert_eq!(Policy::parse(&policy.to_toml()).unwrap(), policy);
    }
}

#[test]
fn a_copy_has_the_list_of_its_vm_or_is_refused() {
    let policy: Policy = toml::from_str("[vm.web]\nallow = []\n[vm.web-2]\nallow = []\n").unwrap();
    let fork = |vm: &str, copy: &str| {
        let template = "sandbox".parse().unwrap();
        decide_fork(&policy, &vm.parse().unwrap(), &template, &copy.parse().unwrap()).into_result().is_ok()
    };
    assert!(fork("web", "web-2") && fork("a", "b"));
    assert!(!fork("web", "free") && !fork("free", "web"));
}

#[test]
fn fuzz_policy_file() {
    nido_fuzz::fuzz("policy", &[EXAMPLE.as_bytes().to_vec()], |input| {
        let Ok(text) = std::str::from_utf8(input) else { return };
        match Policy::parse(text) {
            Ok(policy) => assert_eq!(Policy::parse(&policy.to_toml()).unwrap().to_toml(), policy.to_toml()),
            Err(error) => assert!(!error.message().is_empty() && !error.message().contains('\n'), "{error}"),
        }
    });
}

#[test]
fn fuzz_dangerous_commands() {
    let seeds =
        ["rm -rf /", "sh -c 'cd /; dd if=/dev/zero of=/dev/vda'", "env A=b sudo -u x mkfs.ext4 /dev/sda1 && true"];
    nido_fuzz::fuzz("dangerous-commands", &seeds.map(|text| text.as_bytes().to_vec()), |input| {
        let argv: Vec<Vec<u8>> = input.split(|byte| *byte == b' ').map(<[u8]>::to_vec).collect();
        let _ = dangerous::check(&argv, input);
    });
}
