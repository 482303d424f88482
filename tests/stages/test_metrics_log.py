from pl_personalize.stages.metrics_log import MetricsLog, Record, StageLogger


def test_each_step_is_read_once_as_it_was_logged_last(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(Record("expert", 1, {"loss": 3.0}))
    log.append(Record("expert", 2, {"loss": 2.0}))
    log.append(Record("test", 0, {"acc": 0.5}))
    log.append(Record("expert", 2, {"loss": 1.0, "acc": 0.1}))  # resumed at step 2
    assert log.read() == [
        Record("expert", 1, {"loss": 3.0}),
        Record("expert", 2, {"loss": 1.0, "acc": 0.1}),
        Record("test", 0, {"acc": 0.5}),
    ]


def test_a_line_that_was_cut_is_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.append(Record("expert", 1, {"loss": 3.0}))
    whole = path.read_text()
    path.write_text(whole + whole[:20])
    assert log.read() == [Record("expert", 1, {"loss": 3.0})]
    log.append(Record("expert", 2, {"loss": 2.0}))
    assert log.read()[-1] == Record("expert", 2, {"loss": 2.0})


def test_a_follower_gets_every_record(tmp_path):
    log, records = MetricsLog(tmp_path / "metrics.jsonl"), []
    log.followers.append(records.append)
    StageLogger(log, "expert").log_metrics({"loss": 1.0, "epoch": 3}, step=7)
    assert records == [Record("expert", 7, {"loss": 1.0})]


def test_stages_are_dropped_with_their_substages_from_a_step_on(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.drop({"train/task1": 0})
    assert not (tmp_path / "metrics.jsonl").exists()
    records = [
        Record(stage, step, {"loss": 1.0})
        for stage in ("train/task1", "train/task1/part", "train/task10", "adapt/ann", "test/ann")
        for step in (1, 2)
    ]
    for record in records:
        log.append(record)
    log.drop({"train/task1": 2, "adapt/ann": 0, "test/bob": 0})
    assert log.read() == [records[k] for k in (0, 2, 4, 5, 8, 9)]
    log.append(records[1])
    assert log.read()[1] == records[1]
